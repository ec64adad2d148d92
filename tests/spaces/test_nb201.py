from __future__ import annotations

import itertools
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from pipeline.costs.counts import module_params, weight_bytes
from pipeline.costs.latency import LatencyPredictor, layer_terms
from pipeline.deploy.export import export_onnx, export_skeleton
from pipeline.deploy.parity import check_logits
from pipeline.errors import ConfigError
from pipeline.settings import parse_settings
from pipeline.spaces.nb201 import (
    CONV1,
    CONV3,
    EDGES,
    KERNELS,
    NONE,
    OPERATIONS,
    POOL,
    SKIP,
    NB201Settings,
    NB201Space,
    live_edges,
)
from pipeline.spaces.nb201_modules import NB201Network, NB201Supernet
from pipeline.types import Arch, Arrays, Layer

"""What an architecture costs: counted exactly, or predicted from networks measured on the device."""

from pipeline.costs.budgets import resolve_tiers
from pipeline.costs.counts import module_flops, module_params
from pipeline.costs.latency import HeldOutError, LatencyPredictor, choose_calibration
from pipeline.costs.table import SpaceCosts, build_cost_table, export_for_timing

__all__ = [
    "HeldOutError",
    "LatencyPredictor",
    "SpaceCosts",
    "build_cost_table",
    "choose_calibration",
    "export_for_timing",
    "module_flops",
    "module_params",
    "resolve_tiers",
]

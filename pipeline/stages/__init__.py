"""One module per stage of a run; `pipeline.flow` says in what order. A stage imports no other: what it needs
of an earlier one it reads from the run's folder, through what they share:

records.py           where a stage keeps what it makes, and how a later one reads it
networks.py          networks and the evaluator: new, or as an earlier stage left them
jobs.py              where the independent pieces of a stage are done, several at a time
lower_precision.py   int8 and float16 beside the float32 files of the export
"""

"""What a run hands over: the manifest that programs read, the report that people read, and their checks.

Reading, selecting and verifying need neither torch nor the data, so they run on the target device.
"""

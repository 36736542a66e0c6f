"""Read and write one checkpoint format per module.

`lwm.checkpoints.open` lists the formats and says how to add one.
"""

"""Vectors of many files: a job in shards that can be killed and gone on with. Needs pyarrow, `pyxlbert[parquet]`."""

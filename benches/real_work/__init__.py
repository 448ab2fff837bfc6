"""Real work on stock `dask worker` and on ours: arrays, dataframes, bags, futures."""

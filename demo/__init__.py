"""The demonstration behind `make demo`: a stock Dask scheduler, one worker, a real job, checked answers."""

"""The measurements behind `make bench`: kinds of worker side by side, in one run, under one scheduler."""

"""Data sources, one file each: functions `(split, data_dir, ...)` that return a `data.Source`."""

"""Many texts: files of every format, encoded into shards."""

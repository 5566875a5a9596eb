"""The Python API: one file per command, one public function of the same name."""

"""The thin trainer. `pip install 'fastdistill[train]'` installs what it needs."""

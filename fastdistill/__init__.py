"""fastdistill."""

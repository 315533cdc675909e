"""Files for Autoware: one body from voxels to boxes, with sparse convolutions as its plugins."""

"""A generated data set in the form of nuScenes, for trials without the real one."""

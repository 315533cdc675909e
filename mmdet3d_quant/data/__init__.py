"""Data to calibrate and score on: a frame, a nuScenes folder, and the scores."""

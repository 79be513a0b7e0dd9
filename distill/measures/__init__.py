"""How two sets of images are compared: features, distances, statistics of real images. They train nothing."""

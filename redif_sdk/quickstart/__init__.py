"""The README's main job from end to end, for images by class and for text to image."""

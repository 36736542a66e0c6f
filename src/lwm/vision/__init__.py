"""What the model sees: images and videos in and out as arrays of pixels, and the codes that stand
for them. Knows nothing of text."""

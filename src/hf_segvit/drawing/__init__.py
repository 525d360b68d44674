"""Drawing of segments, points and boxes on images, with Pillow only."""

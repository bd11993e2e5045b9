"""Images: where they come from, how they are split, and how a batch is cropped and flipped."""

"""What flowdistill's tests install to see that another package can add to it."""

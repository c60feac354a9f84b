"""What is checked and timed where there is an accelerator."""

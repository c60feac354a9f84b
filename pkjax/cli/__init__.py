"""The command line: its options, what the commands do, and what they show."""

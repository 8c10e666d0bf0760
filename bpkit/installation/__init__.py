"""What is installed here, and on which machine."""

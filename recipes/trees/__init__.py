"""What trees gain over chains: by replay at equal numbers of nodes and under costs, and live, in one file."""

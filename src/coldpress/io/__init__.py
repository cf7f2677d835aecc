"""Files, the network and the terminal: what coldpress reads and writes outside of itself."""

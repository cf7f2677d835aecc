"""What a press is and sees: the contract, views of a layer, how many pairs are kept and which."""

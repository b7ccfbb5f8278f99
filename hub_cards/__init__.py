"""Templates of what goes to the Hub beside the weights, installed as `ecl_hf.hub_cards`."""

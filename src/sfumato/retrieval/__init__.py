"""DP-RDM: text prompts answered from a private image collection, and the decoder that draws the answers."""

"""Released models from the Hugging Face hub: which files, how they come here whole, and what is made of them."""

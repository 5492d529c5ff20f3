"""Operations that are worth a kernel of their own. The functions here are the plain PyTorch that defines them."""

"""Visual memories: small trainable trees that touch a backbone only through ports. One file, one paper."""

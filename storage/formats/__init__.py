"""File formats that know nothing of a store: documents, safetensors headers, tensor entries, Git LFS pointers."""

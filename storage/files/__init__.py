"""Access to files through fsspec: opening, reading, publishing, local disks, errors, credentials."""

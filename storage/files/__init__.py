"""Access to files through fsspec: reading, publishing, local disks, S3, errors."""

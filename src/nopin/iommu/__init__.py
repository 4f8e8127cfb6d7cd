"""Device-side address translation: PASID table and page requests. Knows no system call."""

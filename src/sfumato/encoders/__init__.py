"""Image -> vector, one image independent of the others; and the small classifiers whose answers are vectors too."""

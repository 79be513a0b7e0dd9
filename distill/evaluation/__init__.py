"""Who is judged, on which noises, by which distances."""

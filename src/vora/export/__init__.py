"""A merged model in other people's engines, and the proof that it answers there as it does here."""

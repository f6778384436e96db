"""HTTP/1.1 connections and request bodies, with limits on size, number and time."""

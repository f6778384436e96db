"""HTTP/1.1 connections and request bodies within limits."""

"""HTTP as a proxy sees it: one shape of message, and sans-I/O codecs for HTTP/1.1 and HTTP/2 on either side."""

# As printed in the document of the EPD service.
curl http://host:port/docs/oauth2-redirect

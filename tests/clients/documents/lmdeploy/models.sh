# As printed in the document of LMDeploy, restful_api.md.
curl http://{server_name}:{server_port}/v1/models

package e2b

import (
	"context"

	api "git.omukk.dev/wrenn/sandbox/api/e2b"
)

// Operations that this host does not have answer with a sentence, so that a caller
// sees that it is the host and not the address that is at fault.

func (*server) ListVolumes(context.Context, api.ListVolumesRequestObject) (api.ListVolumesResponseObject, error) {
	return nil, errVolumes
}

func (*server) CreateVolume(context.Context, api.CreateVolumeRequestObject) (api.CreateVolumeResponseObject, error) {
	return nil, errVolumes
}

func (*server) GetVolume(context.Context, api.GetVolumeRequestObject) (api.GetVolumeResponseObject, error) {
	return nil, errVolumes
}

func (*server) DeleteVolume(context.Context, api.DeleteVolumeRequestObject) (api.DeleteVolumeResponseObject, error) {
	return nil, errVolumes
}

func (*server) ListSecrets(context.Context, api.ListSecretsRequestObject) (api.ListSecretsResponseObject, error) {
	return nil, errSecrets
}

func (*server) CreateSecret(context.Context, api.CreateSecretRequestObject) (api.CreateSecretResponseObject, error) {
	return nil, errSecrets
}

func (*server) GetSecret(context.Context, api.GetSecretRequestObject) (api.GetSecretResponseObject, error) {
	return nil, errSecrets
}

func (*server) UpdateSecret(context.Context, api.UpdateSecretRequestObject) (api.UpdateSecretResponseObject, error) {
	return nil, errSecrets
}

func (*server) DeleteSecret(context.Context, api.DeleteSecretRequestObject) (api.DeleteSecretResponseObject, error) {
	return nil, errSecrets
}

func (*server) ListWebhooks(context.Context, api.ListWebhooksRequestObject) (api.ListWebhooksResponseObject, error) {
	return nil, errWebhooks
}

func (*server) CreateWebhook(context.Context, api.CreateWebhookRequestObject) (api.CreateWebhookResponseObject, error) {
	return nil, errWebhooks
}

func (*server) GetWebhook(context.Context, api.GetWebhookRequestObject) (api.GetWebhookResponseObject, error) {
	return nil, errWebhooks
}

func (*server) UpdateWebhook(context.Context, api.UpdateWebhookRequestObject) (api.UpdateWebhookResponseObject, error) {
	return nil, errWebhooks
}

func (*server) DeleteWebhook(context.Context, api.DeleteWebhookRequestObject) (api.DeleteWebhookResponseObject, error) {
	return nil, errWebhooks
}

package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// maxMetrics bounds the answer to Metrics, which has some 200 bytes.
const maxMetrics = 16 << 10

// Metrics asks the guest what it uses. The numbers are the guest's word. No answer, and
// one that is not metrics, is errdefs.Unavailable.
func (c *Client) Metrics(ctx context.Context) (m guestapi.Metrics, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+guestapi.PathMetrics, nil)
	if err != nil {
		return m, fmt.Errorf("ask the guest for its metrics: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return m, errdefs.Unavailable.Errorf("ask the guest for its metrics: %s", plain(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return m, errdefs.Unavailable.Errorf("ask the guest for its metrics: it answered %s", errdefs.Foreign(resp.Status))
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxMetrics)).Decode(&m); err != nil {
		return guestapi.Metrics{}, errdefs.Unavailable.Errorf("ask the guest for its metrics: %s", plain(err))
	}
	return m, nil
}

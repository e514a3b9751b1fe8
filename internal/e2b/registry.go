package e2b

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/build"
)

// credentials reads how a client proves itself to the registry of an image. They are
// neither kept nor logged.
func (s *server) credentials(ctx context.Context, image string, registry *map[string]any) (build.Credentials, error) {
	if registry == nil {
		return build.Credentials{}, nil
	}
	text := func(name string) string { v, _ := (*registry)[name].(string); return v }
	all := func(names ...string) error {
		for _, name := range names {
			if text(name) == "" {
				return refuse(http.StatusBadRequest, "fromImageRegistry of type %s has no %s", text("type"), name)
			}
		}
		return nil
	}
	switch text("type") {
	case "registry":
		return build.Credentials{Username: text("username"), Password: text("password")}, all("username", "password")
	case "gcp":
		if err := all("serviceAccountJson"); err != nil {
			return build.Credentials{}, err
		}
		if !json.Valid([]byte(text("serviceAccountJson"))) {
			return noLogin("serviceAccountJson is not JSON")
		}
		return build.Credentials{Username: "_json_key", Password: text("serviceAccountJson")}, nil
	case "aws":
		if err := all("awsAccessKeyId", "awsSecretAccessKey", "awsRegion"); err != nil {
			return build.Credentials{}, err
		}
		key := awsKey{id: text("awsAccessKeyId"), secret: text("awsSecretAccessKey"), region: text("awsRegion")}
		return key.registryLogin(ctx, s.aws, image)
	}
	return noLogin("fromImageRegistry must be of type registry, aws or gcp, and not %.40q", text("type"))
}

// noLogin refuses credentials.
func noLogin(format string, args ...any) (build.Credentials, error) {
	return build.Credentials{}, refuse(http.StatusBadRequest, format, args...)
}

// awsKey is an access key of AWS.
type awsKey struct{ id, secret, region string }

// awsTime bounds the exchange of a key for a registry's password.
const awsTime = 15 * time.Second

// awsRegistry is the host name of a registry of AWS. Its API is at the same name with
// "api" for the account.
var awsRegistry = regexp.MustCompile(`^[0-9]{12}\.dkr\.(ecr\.([a-z0-9-]{1,40})\.amazonaws\.com(?:\.cn)?)/`)

// registryLogin exchanges a key for the password of the registry that an image is in:
// GetAuthorizationToken of ECR.
func (k awsKey) registryLogin(ctx context.Context, client *http.Client, image string) (build.Credentials, error) {
	m := awsRegistry.FindStringSubmatch(image)
	if m == nil {
		return noLogin("image %.140q is not in a registry of AWS", image)
	}
	if m[2] != k.region {
		return noLogin("image %.140q is in the region %s, and awsRegion is %.40q", image, m[2], k.region)
	}
	ctx, cancel := context.WithTimeout(ctx, awsTime)
	defer cancel()
	body := []byte("{}")
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://api."+m[1]+"/", bytes.NewReader(body))
	if err != nil {
		return build.Credentials{}, err
	}
	r.Header.Set("Content-Type", "application/x-amz-json-1.1")
	r.Header.Set("X-Amz-Target", "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken")
	k.sign(r, body, "ecr", time.Now())
	resp, err := client.Do(r)
	if err != nil {
		return noLogin("the registry's login at %s cannot be reached", r.URL.Host)
	}
	defer resp.Body.Close()
	var answer struct {
		AuthorizationData []struct{ AuthorizationToken string }
	}
	err = json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&answer)
	if resp.StatusCode != http.StatusOK {
		return noLogin("access denied: the registry's login answered with status code %d", resp.StatusCode)
	}
	if err != nil || len(answer.AuthorizationData) == 0 {
		return noLogin("the registry's login answered with no token")
	}
	pair, err := base64.StdEncoding.DecodeString(answer.AuthorizationData[0].AuthorizationToken)
	user, password, ok := strings.Cut(string(pair), ":")
	if err != nil || !ok {
		return noLogin("the registry's login answered with a token that cannot be read")
	}
	return build.Credentials{Username: user, Password: password}, nil
}

// sign signs a request to the root of a service, version 4 of AWS's signatures.
func (k awsKey) sign(r *http.Request, body []byte, service string, now time.Time) {
	now = now.UTC()
	stamp, day := now.Format("20060102T150405Z"), now.Format("20060102")
	r.Header.Set("X-Amz-Date", stamp)
	const signed = "content-type;host;x-amz-date;x-amz-target"
	canonical := fmt.Sprintf("%s\n%s\n\ncontent-type:%s\nhost:%s\nx-amz-date:%s\nx-amz-target:%s\n\n%s\n%s",
		r.Method, r.URL.Path, r.Header.Get("Content-Type"), r.URL.Host, stamp, r.Header.Get("X-Amz-Target"), signed, hexSum(body))
	scope := strings.Join([]string{day, k.region, service, "aws4_request"}, "/")
	key := []byte("AWS4" + k.secret)
	for _, part := range []string{day, k.region, service, "aws4_request"} {
		key = hmacSum(key, part)
	}
	signature := hmacSum(key, strings.Join([]string{"AWS4-HMAC-SHA256", stamp, scope, hexSum([]byte(canonical))}, "\n"))
	r.Header.Set("Authorization",
		fmt.Sprintf("AWS4-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%x", k.id, scope, signed, signature))
}

func hmacSum(key []byte, text string) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(text))
	return mac.Sum(nil)
}

func hexSum(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

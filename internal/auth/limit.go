package auth

import (
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Rates are how often one key may call. Zero is as often as it likes.
type Rates struct {
	// Requests a second, creates among them, and how many at once.
	Requests float64
	Burst    int
	// Creates a second: requests that begin a VM.
	Creates      float64
	CreatesBurst int
}

// Limiter holds each key to Rates. It is safe for concurrent use.
type Limiter struct {
	rates Rates

	mu   sync.Mutex // over keys
	keys map[string]*buckets
}

type buckets struct {
	requests, creates *rate.Limiter
	usedAt            time.Time
}

// maxBuckets is how many keys a limiter remembers before it forgets those whose
// buckets are full again.
const maxBuckets = 4096

// NewLimiter returns a limiter in which every key has all of its burst.
func NewLimiter(r Rates) *Limiter {
	return &Limiter{rates: r, keys: map[string]*buckets{}}
}

// Decision says whether a request may go on.
type Decision struct {
	Allowed bool
	// Limit is how many requests could come at once, Remaining how many can now.
	Limit, Remaining int
	// Reset is when there is room for one more if Allowed is false; else when the
	// bucket is full again.
	Reset time.Duration
	// limited is false where there is no rate.
	limited bool
}

// Take counts one request of a key.
func (l *Limiter) Take(keyID string, create bool, now time.Time) Decision {
	b := l.bucketsOf(keyID, now)
	d := take(b.requests, now)
	if d.Allowed && create {
		if c := take(b.creates, now); c.limited {
			return c
		}
	}
	return d
}

func take(b *rate.Limiter, now time.Time) Decision {
	if b.Limit() == rate.Inf {
		return Decision{Allowed: true}
	}
	d := Decision{Allowed: b.AllowN(now, 1), Limit: b.Burst(), limited: true}
	tokens := max(b.TokensAt(now), 0)
	d.Remaining = int(tokens)
	missing := float64(b.Burst()) - tokens
	if !d.Allowed {
		missing = 1 - tokens
	}
	d.Reset = time.Duration(missing / float64(b.Limit()) * float64(time.Second))
	return d
}

func (l *Limiter) bucketsOf(keyID string, now time.Time) *buckets {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.keys[keyID]
	if b == nil {
		if len(l.keys) >= maxBuckets {
			for id, old := range l.keys {
				if now.Sub(old.usedAt) > time.Hour {
					delete(l.keys, id)
				}
			}
		}
		b = &buckets{requests: bucket(l.rates.Requests, l.rates.Burst), creates: bucket(l.rates.Creates, l.rates.CreatesBurst)}
		l.keys[keyID] = b
	}
	b.usedAt = now
	return b
}

func bucket(perSecond float64, burst int) *rate.Limiter {
	if perSecond <= 0 {
		return rate.NewLimiter(rate.Inf, 0)
	}
	return rate.NewLimiter(rate.Limit(perSecond), max(burst, 1))
}

// Tell puts a decision into an answer's headers, in whole seconds as clients read
// them. Retry-After is there only if the request was refused.
func (d Decision) Tell(h http.Header) {
	if !d.limited {
		return
	}
	seconds := int(math.Ceil(d.Reset.Seconds()))
	h.Set("RateLimit-Limit", strconv.Itoa(d.Limit))
	h.Set("RateLimit-Remaining", strconv.Itoa(d.Remaining))
	h.Set("RateLimit-Reset", strconv.Itoa(seconds))
	if !d.Allowed {
		h.Set("Retry-After", strconv.Itoa(max(seconds, 1)))
	}
}

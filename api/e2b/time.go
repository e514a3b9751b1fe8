package e2b

import "time"

// Timestamp is a time as clients expect it: UTC with exactly three decimals.
type Timestamp struct{ time.Time }

// At returns the timestamp of an instant.
func At(t time.Time) Timestamp { return Timestamp{t} }

// MarshalJSON writes the form that time.Time shortens where decimals are zero.
func (t Timestamp) MarshalJSON() ([]byte, error) {
	return []byte(t.UTC().Format(`"2006-01-02T15:04:05.000Z"`)), nil
}

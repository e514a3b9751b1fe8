package server

import (
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// withStrictCodecs makes a handler refuse requests with fields that it does not
// know, in every encoding: what a caller asks for is done or refused, never
// passed over. Answers are read by clients with codecs of their own.
func withStrictCodecs() connect.HandlerOption {
	return connect.WithHandlerOptions(
		connect.WithCodec(binaryCodec{}),
		connect.WithCodec(jsonCodec{"json"}),
		connect.WithCodec(jsonCodec{"json; charset=utf-8"}),
	)
}

type binaryCodec struct{}

func (binaryCodec) Name() string { return "proto" }

func (binaryCodec) Marshal(m any) ([]byte, error) { return proto.Marshal(m.(proto.Message)) }

func (binaryCodec) MarshalAppend(to []byte, m any) ([]byte, error) {
	return proto.MarshalOptions{}.MarshalAppend(to, m.(proto.Message))
}

func (binaryCodec) Unmarshal(data []byte, m any) error {
	if err := proto.Unmarshal(data, m.(proto.Message)); err != nil {
		return err
	}
	return checkKnown(m.(proto.Message).ProtoReflect())
}

// checkKnown refuses a message that has a field, however deep, of which only the
// number is known.
func checkKnown(m protoreflect.Message) error {
	if unknown := m.GetUnknown(); len(unknown) > 0 {
		number, _, _ := protowire.ConsumeTag(unknown)
		return fmt.Errorf("unknown field %d of %s: this host agent is older than its client", number, m.Descriptor().Name())
	}
	var err error
	m.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case field.IsMap():
			if field.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					err = checkKnown(v.Message())
					return err == nil
				})
			}
		case field.Message() == nil:
		case field.IsList():
			for i := 0; i < v.List().Len() && err == nil; i++ {
				err = checkKnown(v.List().Get(i).Message())
			}
		default:
			err = checkKnown(v.Message())
		}
		return err == nil
	})
	return err
}

// jsonCodec is protobuf's JSON under one of the names of its content type.
type jsonCodec struct{ name string }

func (c jsonCodec) Name() string { return c.name }

func (jsonCodec) Marshal(m any) ([]byte, error) { return protojson.Marshal(m.(proto.Message)) }

func (jsonCodec) MarshalAppend(to []byte, m any) ([]byte, error) {
	return protojson.MarshalOptions{}.MarshalAppend(to, m.(proto.Message))
}

func (jsonCodec) Unmarshal(data []byte, m any) error {
	if len(data) == 0 {
		return errors.New("an empty body is no JSON object; {} is")
	}
	err := protojson.Unmarshal(data, m.(proto.Message))
	if err == nil {
		return nil
	}
	// protojson varies its spaces, so that texts are not compared.
	text := strings.TrimPrefix(strings.ReplaceAll(err.Error(), "\u00a0", " "), "proto: ")
	return fmt.Errorf("%s: %s", m.(proto.Message).ProtoReflect().Descriptor().Name(), text)
}

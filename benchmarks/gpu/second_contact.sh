#!/usr/bin/env bash
# What first_contact.sh left, in at most four minutes: the automatic check from a cold start, times by shape class, cases
# that were not timed, epochs that were not trained. Needed is the results.jsonl of that call, in $BEFORE (default: .data/first/results.jsonl):
#
#   BEFORE=.data/first/results.jsonl bash benchmarks/gpu/second_contact.sh
export BEFORE=${BEFORE:-.data/first/results.jsonl} LIMIT=${LIMIT:-235} PARTS=${PARTS:-"automatic classes times train"}
exec bash "$(dirname "${BASH_SOURCE[0]}")/first_contact.sh"

"""The hash that draws for single images: the finaliser of MurmurHash3, on words of 32 bits."""


def finalised(word):
    word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
    word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


def drawn(salt, epoch, index, number):
    return finalised((finalised((finalised((int(salt) + int(epoch)) % 2**32) + int(index)) % 2**32) + int(number)) % 2**32)

; debugregs: four breakpoint addresses and their switches
;@ entry real16
%include "real16.inc"
start:
    mov eax, 0x11110000
    mov dr0, eax
    mov eax, 0x22220000
    mov dr1, eax
    mov eax, 0x33330000
    mov dr2, eax
    mov eax, 0x44440000
    mov dr3, eax
    mov eax, 0x755              ; DR0 to DR3 break at instructions, which this guest never comes to
    mov dr7, eax
    call be_moved
    mov eax, dr0
    cmp eax, 0x11110000
    jne failed
    mov eax, dr1
    cmp eax, 0x22220000
    jne failed
    mov eax, dr2
    cmp eax, 0x33330000
    jne failed
    mov eax, dr3
    cmp eax, 0x44440000
    jne failed
    mov eax, dr7
    cmp eax, 0x755
    jne failed
    jmp passed

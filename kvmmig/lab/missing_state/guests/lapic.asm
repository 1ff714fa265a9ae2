; lapic: its timer ticks, and goes on ticking when it has been moved
;@ entry real16
%include "real16.inc"
start:
    call apic_on
    mov ax, 0x60
    mov bx, apic_tick
    call set_vector
    mov ecx, X2APIC_DIVIDE
    xor edx, edx
    mov eax, 0xb                ; by 1
    wrmsr
    mov ecx, X2APIC_TIMER
    mov eax, 0x20060            ; periodic, vector 0x60
    wrmsr
    mov ecx, X2APIC_COUNT
    mov eax, 1000000            ; 1 ms: KVM's bus has 1 GHz
    wrmsr
    call be_moved
    mov bl, 3                   ; one or two might have waited in the APIC
    call wait_for_ticks
    jmp passed
